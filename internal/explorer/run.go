package explorer

import (
	"context"
	"errors"
	"fmt"
	"os"

	tea "charm.land/bubbletea/v2"

	"conex/internal/analyze"
	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
)

// Main is the program conex-explore: args are what `conex image explore` gives it, its own name, the root, the state folder and the image's id. It
// returns the exit code.
func Main(args []string) int {
	if len(args) != 5 {
		fmt.Fprintln(os.Stderr, "conex-explore: this is a part of conex: use `conex image explore IMAGE`")
		return 125
	}
	if err := run(args[2], args[3], args[4]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", args[1], err)
		return 1
	}
	return 0
}

func run(root, state, id string) error {
	r, err := disk.OpenRoot(root)
	if err != nil {
		return err
	}
	ls, err := layers.Open(r, layers.Options{State: state})
	if err != nil {
		return err
	}
	images := image.Open(r, blobs.Open(r), ls)
	found, err := images.Resolve(id)
	if err != nil {
		return err
	}
	img, err := analyze.Store{Images: images, Layers: ls}.Image(context.Background(), found)
	if err != nil {
		return err
	}
	_, err = tea.NewProgram(New(img, os.Getenv("NO_COLOR") == "")).Run()
	if errors.Is(err, tea.ErrInterrupted) {
		return nil
	}
	return err
}
