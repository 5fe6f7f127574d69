# SPDX-License-Identifier: Apache-2.0
"""Functions that draw DataFrames as matplotlib Figures. None of them shows or saves a figure."""

from cwndtrace import isolated

isolated.load_matplotlib()
