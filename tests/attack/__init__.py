"""An attack on all that is read and written: kills, damaged files, bad inputs. ``python -m tests.attack`` is the long form."""
