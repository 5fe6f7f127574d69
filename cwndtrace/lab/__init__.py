# SPDX-License-Identifier: Apache-2.0
"""A long path on one machine, and what is run over it."""
