"""What every picture of spikes has in common: its colours, and what the groups of a layer are called.

Colours are Okabe and Ito's, which people with any kind of colour blindness can tell apart.
"""

POSITIVE, NEGATIVE, SILENT = "#D55E00", "#0072B2", "#FFFFFF"
DENSE = "#999999"
PLACES = {
    "attention.self.neurons": "into query, key, value",
    "attention.self.key_neurons": "keys",
    "attention.self.value_neurons": "values",
    "attention.output.neurons": "attention output",
    "intermediate.neurons": "feed-forward in",
    "output.neurons": "feed-forward out",
}
