"""Do two engines agree? The same inputs and noise go through both, compared stage by stage."""
