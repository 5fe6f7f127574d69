# SPDX-License-Identifier: Apache-2.0
"""Facts about the running kernel, and decisions that depend on them."""
