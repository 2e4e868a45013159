"""The branches of each architecture, the reference pass, and multiply-adds."""
