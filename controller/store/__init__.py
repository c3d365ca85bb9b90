"""Where the controller's state lives: the port that the rest of the controller sees, and its SQL adapter."""
