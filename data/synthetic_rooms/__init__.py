# SPDX-License-Identifier: Apache-2.0
"""Furnished rooms of known truth: layout, exact ray casting, and questions in the form of VSI-Bench."""
