"""Fake providers and the scripted tour: the gateway can be watched, and tested, without a key and without the
internet."""
