from sam2jq.cli.main import main

raise SystemExit(main())
