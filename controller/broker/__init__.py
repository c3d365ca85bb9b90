"""The MQTT side: a broker of our own for small fleets, the controller's link to whichever broker there is, chunks."""
