"""Judges an untrusted grammar in a process of its own: some schemas of a kilobyte take hours or all memory to compile.

    python -m tuneloom.engine.grammar_check < grammar > verdict

Standard output is the fault as text, nothing if there is none. The process ends itself at its limits.
"""

import resource
import sys

CPU_S = 2
MEMORY_BYTES = 1 << 30


def fault_of(grammar: str) -> str:
    """What is wrong with a grammar in llguidance's form; empty if nothing is."""
    from llguidance import LLMatcher, LLParserLimits

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(verbose_errors=False))
    return messages[0] if is_error else ""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(fault_of(sys.stdin.read()))


if __name__ == "__main__":
    main()
