// Command conex-explore is the full screen of `conex image explore`, which executes it. It is a program of its own because its terminal
// library's initialisation would slow every command of conex.
package main

import (
	"os"

	"conex/internal/explorer"
)

func main() { os.Exit(explorer.Main(os.Args)) }
