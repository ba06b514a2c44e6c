"""Gates: which experts a pixel selects, and how a choice is held, shared and looked after."""
