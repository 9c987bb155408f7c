import pytest
import torch

from tensornet_compress.files.steps import resumed
from tensornet_compress.kv.profile.calibrate import calibrate
from tests.kv.tiny_models import VOCABULARY, tiny


def test_a_calibration_that_was_killed_anywhere_goes_on_to_the_same_profile(tmp_path):
    class KilledError(BaseException):
        pass

    model, texts = tiny("llama-gqa"), [torch.randint(1, VOCABULARY, (1, 96)) for _ in range(21)]
    options = {"sensitivity_windows": 12, "draws": 2, "window": 16}
    wanted = calibrate(model, texts, **options).fingerprint()
    for stop in (7, 9, 17, 20):
        read = []

        def failing(stop=stop, read=read):
            for number, text in enumerate(texts):
                if number == stop:
                    raise KilledError
                read.append(number)
                yield text

        folder = tmp_path / str(stop)
        with pytest.raises(KilledError), resumed(folder, {}) as steps:
            calibrate(model, failing(), steps=steps, **options)
        with resumed(folder, {}) as steps:
            assert (steps.found("sums") is not None) == (stop > 8)
            assert calibrate(model, texts, steps=steps, **options).fingerprint() == wanted
        assert list(tmp_path.iterdir()) == []
