# SPDX-License-Identifier: Apache-2.0
"""The report on a capture, assembled once and shown in a terminal, as JSON or as a page."""
