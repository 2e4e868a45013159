"""Where each architecture's branches are, the reference pass, and multiply-adds."""
