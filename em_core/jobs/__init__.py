"""Many independent jobs: what they are, their keys, where results are kept, and what runs them."""
