// Command sweep takes down what a conex data folder still has in the kernel once its containers are gone: the default
// bridge, its nftables table, forwarding where conex switched it on, and the mounts of layers. The folders stay.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/network"
)

func main() {
	root := flag.String("root", os.Getenv("CONEX_ROOT"), "conex data folder")
	state := flag.String("state", os.Getenv("CONEX_STATE"), "conex state folder")
	flag.Parse()
	if err := sweep(*root, *state); err != nil {
		fmt.Fprintln(os.Stderr, "sweep:", err)
		os.Exit(1)
	}
}

func sweep(rootDir, state string) error {
	if rootDir == "" || state == "" {
		return errors.New("-root and -state are needed")
	}
	root, err := disk.OpenRoot(rootDir)
	if err != nil {
		return err
	}
	ls, err := layers.Open(root, layers.Options{State: state})
	if err != nil {
		return err
	}
	return errors.Join(network.Open(root, state).Cleanup(context.Background()), ls.Unmount())
}
