# SPDX-License-Identifier: Apache-2.0
"""A long network path on one machine, and the experiments that run over it."""
