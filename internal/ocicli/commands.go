package ocicli

import (
	"errors"
	"flag"
	"fmt"
)

// commands lists the command line's words in the order of help.
func commands() []command {
	return []command{
		{name: "create", usage: "ID", short: "make a container that waits for its start", min: 1, max: 1, flags: createCommand},
		{name: "start", usage: "ID", short: "execute a created container's command", min: 1, max: 1, flags: startCommand},
		{name: "run", usage: "ID", short: "create, start and, in the foreground, delete", min: 1, max: 1, flags: runCommand},
		{name: "exec", usage: "ID COMMAND [ARGUMENTS]", short: "start a further process in a container", min: 1, max: -1, flags: execCommand},
		{name: "state", usage: "ID", short: "print a container's state", min: 1, max: 1, flags: stateCommand},
		{name: "list", short: "list containers", min: 0, max: 0, flags: listCommand},
		{name: "ps", usage: "ID [OPTIONS OF ps]", short: "list a container's processes", min: 1, max: -1, flags: psCommand},
		{name: "kill", usage: "ID [SIGNAL]", short: "send a signal (SIGTERM) to the first process", min: 1, max: 2, flags: killCommand},
		{name: "pause", usage: "ID", short: "stop all processes", min: 1, max: 1, flags: pauseCommand(true)},
		{name: "resume", usage: "ID", short: "let them go on", min: 1, max: 1, flags: pauseCommand(false)},
		{name: "update", usage: "ID", short: "change a container's limits", min: 1, max: 1, flags: updateCommand},
		{name: "events", usage: "ID", short: "print counters and memory events", min: 1, max: 1, flags: eventsCommand},
		{name: "delete", usage: "ID", short: "remove a stopped container", min: 1, max: 1, flags: deleteCommand},
		{name: "spec", short: "write a config.json to begin with", min: 0, max: 0, flags: specCommand},
		{name: "features", short: "print what of the specification works", min: 0, max: 0, flags: featuresCommand},
		{name: "checkpoint", usage: "ID", short: "refused", min: 0, max: -1, flags: refuse("checkpoint")},
		{name: "restore", usage: "ID", short: "refused", min: 0, max: -1, flags: refuse("restore")},
	}
}

func refuse(name string) func(*flag.FlagSet) func(*app, []string) error {
	return func(fs *flag.FlagSet) func(*app, []string) error {
		// Its flags would be refused before it is.
		return func(*app, []string) error { return errCheckpoint(name) }
	}
}

func errCheckpoint(name string) error {
	return fmt.Errorf("%s: checkpoints of processes are not supported: %w", name, errors.ErrUnsupported)
}
