"""The check of docstrings' first lines that `make lint` runs."""

from __future__ import annotations

import textwrap

import pytest

from tests.lint_docstrings import vague_docstrings


@pytest.mark.parametrize("start", ["What", "Which", "Where", "How", "Of", "Those", "The same"])
def test_a_docstring_that_names_no_thing_is_found(start):
    source = f'''
        """Module."""

        class Thing:
            def method(self):
                """{start} it is.

                More.
                """
    '''
    assert vague_docstrings(textwrap.dedent(source)) == [(6, f"{start} it is.")]


@pytest.mark.parametrize(
    "text", ["Sum of what is left.", "Whatever fits.", "Offset.\\n\\nWhat else."]
)
def test_only_the_first_words_count(text):
    assert vague_docstrings(f'def function():\n    """{text}"""\n    """What"""\n') == []
