# SPDX-License-Identifier: Apache-2.0
"""The analyses of a capture: pure functions on DataFrames. None of them reads a file or prints."""
