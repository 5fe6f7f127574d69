# SPDX-License-Identifier: Apache-2.0
"""What records mean: pure functions from DataFrames to DataFrames. Nothing here reads a file or prints."""
