from sam2jq.cli import main

raise SystemExit(main())
