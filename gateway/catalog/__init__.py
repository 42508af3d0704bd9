"""What is known of models and hardware before anyone measures them, each row with its source and date.

`prices`: cloud models, from litellm's price map and a few rows of our own. `models`: the shapes of open models, from
their config.json. `hardware`: memory, bandwidth, compute, power and price. All of it is data and look-ups; what follows
from it (memory, speed, cost) is worked out in roofline.py and costs.py.
"""
