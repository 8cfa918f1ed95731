"""``s2w report``: what a run directory holds, as one page that says whether the run was good."""
