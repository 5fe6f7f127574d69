# SPDX-License-Identifier: Apache-2.0
"""Pictures: DataFrames in, matplotlib Figures out. Nothing here shows or saves one."""

from cwndtrace import isolated

isolated.load_matplotlib()
