# SPDX-License-Identifier: Apache-2.0
"""Where records come from, and the session that turns them into batches."""
