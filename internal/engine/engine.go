// Package engine is conex's set of use cases: one file each, called by every front end (command line, API) alike.
//
// It holds no authority in memory: it works on files through the stores of the floor below and talks to monitors over
// their sockets, so any number of engines may run at once. Requests and results carry the structs of Docker's Engine API
// (github.com/moby/moby/api), so that front ends map onto them without a second model.
package engine

import (
	"io"
	"os"
	"path/filepath"
	"sync"

	"conex/internal/blobs"
	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/network"
	"conex/internal/volume"
)

// Engine opens the stores under one root and one state folder. The stores open on first use, since most commands need few.
type Engine struct {
	cfg    *config.Config
	root   *disk.Root
	layers func() (*layers.Store, error)
	images func() (*image.Store, error)
}

// Open prepares the root (--root) and state (--state) folders that cfg names.
func Open(cfg *config.Config) (*Engine, error) {
	root, err := disk.OpenRoot(cfg.Root)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(cfg.State, "c"), 0o700); err != nil {
		return nil, err
	}
	e := &Engine{cfg: cfg, root: root}
	e.layers = sync.OnceValues(func() (*layers.Store, error) {
		return layers.Open(root, layers.Options{Driver: cfg.StorageDriver, State: cfg.State})
	})
	e.images = sync.OnceValues(func() (*image.Store, error) {
		ls, err := e.layers()
		if err != nil {
			return nil, err
		}
		return image.Open(root, e.Blobs(), ls), nil
	})
	return e, nil
}

// Root returns the data folder.
func (e *Engine) Root() *disk.Root { return e.root }

// State returns the folder of what a reboot clears (--state).
func (e *Engine) State() string { return e.cfg.State }

// Layers returns the layer store.
func (e *Engine) Layers() (*layers.Store, error) { return e.layers() }

// Blobs returns the blob store.
func (e *Engine) Blobs() *blobs.Store { return blobs.Open(e.root) }

// Images returns the image store.
func (e *Engine) Images() (*image.Store, error) { return e.images() }

// Containers returns the container store.
func (e *Engine) Containers() *container.Store { return container.Open(e.root, e.cfg.State) }

// Volumes returns the volume store.
func (e *Engine) Volumes() *volume.Store {
	s := volume.Open(e.root, e.cfg.State)
	s.Number = e.volumeNumber
	return s
}

// Networks returns the network manager.
func (e *Engine) Networks() *network.Manager { return network.Open(e.root, e.cfg.State) }

// Progress receives what a long action does, as it goes. Nil is allowed wherever it is asked for.
type Progress func(Event)

// Event is one step of a pull, import or build.
type Event struct {
	// ID groups events of one thing: a layer's short digest, a build step's number.
	ID string
	// Action says what happens to it, in Docker's words: "Pulling fs layer", "Downloading", "Pull complete", "Already exists".
	Action string
	// Current and Total count bytes; Total is 0 when unknown.
	Current, Total int64
	// Message is a line of its own, when there is no ID.
	Message string
}

func (p Progress) emit(ev Event) {
	if p != nil {
		p(ev)
	}
}

// Streams are a caller's standard streams for an attached container or exec.
type Streams struct {
	Stdin          io.Reader // nil: none
	Stdout, Stderr io.Writer // nil: discard
	// Resize delivers the terminal's size as it changes; the first value is the initial size. Nil without a terminal.
	Resize <-chan Size
	// Signals are forwarded to the process (--sig-proxy). Nil: none.
	Signals <-chan os.Signal
	// DetachKeys is the key sequence that leaves the container running, as in "ctrl-p,ctrl-q"; used with a terminal only.
	DetachKeys string
}

// Size is a terminal's size in character cells.
type Size struct{ Rows, Cols uint16 }
