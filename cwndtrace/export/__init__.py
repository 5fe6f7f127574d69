# SPDX-License-Identifier: Apache-2.0
"""Captures in the formats of other tools."""
