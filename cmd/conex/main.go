// Command conex builds images and runs containers. Invoked as docker (a link) it does the same under that name; invoked as
// conex-monitor it is the process that owns one container.
package main

import (
	"os"

	"conex/internal/cli"
	_ "conex/internal/monitor"         // takes over executions as conex-monitor before main
	_ "conex/internal/ocicli/takeover" // takes over executions as conex-runtime, and `conex runtime`
)

func main() { os.Exit(cli.Main(os.Args)) }
