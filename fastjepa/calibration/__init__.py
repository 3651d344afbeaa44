"""What `auto` takes on this GPU: measured here once, each candidate in a child process, and remembered.

`choice` says what can be chosen, `setting` what it is measured for, `trial` what came of one candidate, `search` which
candidate is next, `store` where the rows are kept, `children` how they are measured, and `verdict` puts it together:
`resolve(setting, device)`. What a child does is `fastjepa.trials`, which is started by name and never imported from
here. It may import `files`, `policy`, `config`, `environment` and `storage`.
"""
