# SPDX-License-Identifier: Apache-2.0
"""The results of the analyses in words and in HTML."""
