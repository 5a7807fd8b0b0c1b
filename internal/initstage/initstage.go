// Package initstage owns the moment in which a re-execution of conex takes another road, before main and before the
// heavy packages (command line, registries, BuildKit) initialise.
//
// Go initialises packages in the order of their import paths as soon as their imports are ready, and "conex/..." sorts
// before "github.com/...". A package with few imports that calls Takeover in its init therefore starts early: measure it
// with GODEBUG=inittrace=1.
package initstage

import (
	"os"
	"strings"
)

// base is path's last part. Package path/filepath initialises late, and so would whatever imports it.
func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// Takeover runs main and exits with its result when this process was executed under the given name (the base of argv[0]).
// Otherwise it returns at once.
//
// main runs on a goroutine of its own: the one that runs init functions is locked to the process's first thread, and every
// switch from and to it would cost a thread switch.
func Takeover(name string, main func() int) {
	if len(os.Args) == 0 || base(os.Args[0]) != name {
		return
	}
	takeOver(main)
}

// TakeoverCommand is Takeover for a first argument, whatever the program is called.
func TakeoverCommand(name string, main func() int) {
	if len(os.Args) > 1 && os.Args[1] == name {
		takeOver(main)
	}
}

// TakeoverBefore runs do, which may execute another program, before a command line that the OCI runtime's name or word begins; wanted
// gets its arguments.
func TakeoverBefore(wanted func(args []string) bool, do func()) {
	switch {
	case len(os.Args) > 0 && base(os.Args[0]) == "conex-runtime":
		if wanted(os.Args[1:]) {
			do()
		}
	case len(os.Args) > 1 && os.Args[1] == "runtime":
		if wanted(os.Args[2:]) {
			do()
		}
	}
}

func takeOver(main func() int) {
	code := make(chan int)
	go func() { code <- main() }() // ends with the process
	os.Exit(<-code)
}
