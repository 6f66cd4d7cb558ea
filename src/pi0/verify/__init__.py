"""Proof that two engines agree: the same inputs and noise through both, compared stage by stage."""
