// Command export writes the images of a conex data folder to an OCI layout that images/serve can serve. It is what
// images/make ends with.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/test/mirror"
)

func main() {
	root := flag.String("root", "", "conex data folder")
	state := flag.String("state", "", "conex state folder")
	layout := flag.String("layout", "", "folder to write the layout to")
	flag.Parse()
	if err := export(*root, *state, *layout); err != nil {
		fmt.Fprintln(os.Stderr, "export:", err)
		os.Exit(1)
	}
}

func export(rootDir, state, layout string) error {
	if rootDir == "" || state == "" || layout == "" {
		return fmt.Errorf("-root, -state and -layout are needed")
	}
	root, err := disk.OpenRoot(rootDir)
	if err != nil {
		return err
	}
	ls, err := layers.Open(root, layers.Options{State: state})
	if err != nil {
		return err
	}
	return mirror.Export(context.Background(), image.Open(root, blobs.Open(root), ls), ls.OpenTar, layout)
}
