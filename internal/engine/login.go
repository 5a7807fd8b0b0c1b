package engine

import (
	"context"
	"errors"
	"fmt"

	"conex/internal/credentials"
	"conex/internal/registry"
)

// LoginRequest asks a registry whether it accepts somebody, and keeps the credentials then.
type LoginRequest struct {
	// Server is the registry's address, "" for Docker Hub.
	Server             string
	Username, Password string
	// Ask completes what is missing, from the user; known is the name that is kept so far.
	Ask func(known string) (username, password string, err error)
	// Stored is told before kept credentials are tried, which happens when the request has none, and of their failure. Nil is allowed.
	Stored func(username string, failed error)
}

// LoginResult says where the credentials are.
type LoginResult struct {
	// File is the user's configuration file of Docker's format.
	File string
	// Helper is the credential helper that has them, "" when they are in File for everybody who can read it.
	Helper string
}

// ErrDenied says that a registry does not accept somebody.
var ErrDenied = registry.ErrDenied

// Login tries credentials with a registry. After an error everything is kept as it was.
func (e *Engine) Login(ctx context.Context, req LoginRequest) (LoginResult, error) {
	if req.Server == "" {
		req.Server = credentials.Hub
	}
	domain, err := credentials.CheckServer(req.Server)
	if err != nil {
		return LoginResult{}, &kindError{ErrInvalid, err}
	}
	client := e.registryClient()
	defer client.Close()
	store := credentials.Open()
	known, err := store.Get(ctx, req.Server)
	if err != nil {
		return LoginResult{}, err
	}
	try := func(c credentials.Credentials) (LoginResult, error) {
		identity, err := client.Login(ctx, domain, c)
		if err != nil {
			return LoginResult{}, fmt.Errorf("login to %s: %w", domain, registry.Cause(err))
		}
		if identity != "" {
			c.IdentityToken, c.Password = identity, ""
		}
		helper, err := store.Put(ctx, req.Server, c)
		if err != nil {
			return LoginResult{}, fmt.Errorf("keep credentials for %s: %w", domain, err)
		}
		return LoginResult{File: store.Path(), Helper: helper}, nil
	}
	if req.Username == "" && req.Password == "" && (known.Password != "" || known.IdentityToken != "") {
		if req.Stored != nil {
			req.Stored(known.Username, nil)
		}
		r, err := try(known)
		if err == nil || ctx.Err() != nil {
			return r, err
		}
		if req.Stored != nil {
			req.Stored(known.Username, err)
		}
	}
	if req.Username == "" || req.Password == "" {
		name := known.Username
		if req.Username != "" {
			name = req.Username
		}
		user, password, err := req.Ask(name)
		if err != nil {
			return LoginResult{}, err
		}
		req.Username, req.Password = user, password
	}
	switch {
	case req.Username == "":
		return LoginResult{}, &kindError{ErrInvalid, errors.New("username is empty")}
	case req.Password == "":
		return LoginResult{}, &kindError{ErrInvalid, errors.New("password is empty")}
	}
	return try(credentials.Credentials{Username: req.Username, Password: req.Password})
}

// LoginServer returns the name under which a server's credentials are kept; "" means Docker Hub.
func LoginServer(server string) string { return credentials.Key(server) }

// Logout forgets the credentials for a server, "" for Docker Hub. It is no error when there are none.
func (e *Engine) Logout(ctx context.Context, server string) error {
	if server == "" {
		server = credentials.Hub
	}
	domain, err := credentials.CheckServer(server)
	if err != nil {
		return &kindError{ErrInvalid, err}
	}
	if err := credentials.Open().Delete(ctx, server); err != nil {
		return fmt.Errorf("forget credentials for %s: %w", domain, err)
	}
	return nil
}
