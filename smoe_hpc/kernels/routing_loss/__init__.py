"""The routing classification loss and the damping of wrong experts, inside the layer's own backward."""
