"""Losses between what layers of student and teacher say, and the projectors between them."""
