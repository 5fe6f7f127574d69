# SPDX-License-Identifier: Apache-2.0
"""What a capture says, put together once and shown in a terminal, as JSON or as a page."""
