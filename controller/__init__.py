"""The controller: keeps releases, knows the fleet, decides who runs what, and tells them."""
