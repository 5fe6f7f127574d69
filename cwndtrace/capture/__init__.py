# SPDX-License-Identifier: Apache-2.0
"""Sources of raw records, and the session that turns the records into batches."""
