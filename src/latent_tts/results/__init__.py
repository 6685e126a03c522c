"""Every file of a run, and the statistics and figures made of them."""
