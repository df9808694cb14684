"""The environment of all tests, and of the processes they start; set before torch reads it."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
