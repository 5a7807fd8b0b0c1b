// Command tell is a program that package shield executes again. It tells how it was executed.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"syscall"

	_ "conex/internal/ocicli/shield"
)

func main() {
	var st syscall.Statfs_t
	if err := syscall.Statfs("/proc/self/exe", &st); err != nil {
		panic(err)
	}
	env, err := os.ReadFile("/proc/self/environ") // as it is: os.Environ leaves out what is there twice
	if err != nil {
		panic(err)
	}
	const readOnly = 1 // ST_RDONLY
	err = json.NewEncoder(os.Stdout).Encode(map[string]any{"Args": os.Args, "Env": strings.SplitAfter(string(env), "\x00"), "ReadOnly": st.Flags&readOnly != 0})
	if err != nil {
		panic(err)
	}
}
