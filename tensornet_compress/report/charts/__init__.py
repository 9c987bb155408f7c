"""The charts of a report: matplotlib draws them, the page's style sheet colours them."""
