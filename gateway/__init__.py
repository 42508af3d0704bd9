"""The gateway: decides by policy which deployment answers a request, and relays the answer. Carries no torch."""
