"""The real servers that tests talk to: Firestore and Firebase Auth emulators of Google, a Cloud Storage server, Redis.

`python -m tests.parts` installs what is missing and says what cannot be. A test that needs a part which is not there
fails; none is skipped.
"""
