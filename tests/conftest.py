import os

# Nothing on a hub can be reached from a test, and nothing should try; tests with a Hub of their own say so.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
