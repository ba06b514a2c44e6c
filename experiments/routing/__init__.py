"""How routing settles on noisy data: the study behind the defaults of the routing loss (docs/noisy_heat.md)."""
