// Package initstage owns the moment in which a re-execution of conex takes another road, before main and before the
// heavy packages (command line, registries, BuildKit) initialise.
//
// Go initialises packages in the order of their import paths as soon as their imports are ready, and "conex/..." sorts
// before "github.com/...". A package with few imports that calls Takeover in its init therefore starts early: measure it
// with GODEBUG=inittrace=1.
package initstage

import (
	"os"
	"path/filepath"
)

// Takeover runs main and exits with its result when this process was executed under the given name (the base of argv[0]).
// Otherwise it returns at once.
//
// main runs on a goroutine of its own: the one that runs init functions is locked to the process's first thread, and every
// switch from and to it would cost a thread switch.
func Takeover(name string, main func() int) {
	if len(os.Args) == 0 || filepath.Base(os.Args[0]) != name {
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

func takeOver(main func() int) {
	code := make(chan int)
	go func() { code <- main() }() // ends with the process
	os.Exit(<-code)
}
