// Package takeover makes a program that imports it the OCI runtime command line, when it is executed under that name or with the word
// "runtime".
package takeover

import (
	"os"

	"conex/internal/initstage"
	"conex/internal/ocicli"
)

func init() {
	initstage.Takeover(ocicli.Name, func() int { return ocicli.Main(os.Args[1:]) })
	initstage.TakeoverCommand("runtime", func() int { return ocicli.Main(os.Args[2:]) })
}
